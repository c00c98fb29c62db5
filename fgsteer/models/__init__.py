"""Models: loading them, where their hookpoints are, and whether a vector or an SAE fits one.

loading.py       ``load_model``: a model that fgsteer ships SAEs for, or one of the hub or a folder
shipped.py       the models that fgsteer ships SAEs for, and where their files are
unpacking.py     weights that another package holds as GGUF, unpacked into the user's cache
checkpoints.py   a model and its tokenizer read by transformers, with errors that say what is wrong
hookpoints.py    ``Hookpoint``: its names, and the module of a model that it stands for
devices.py       the device that a model is put on
chat.py          whether a model chats
properties.py    a model's width, window, device, and its special and virtual tokens
names.py         one name for all spellings of a model's
pairing.py       whether a vector or an SAE was made for the model that is loaded
gradients.py     gradients where the caller has turned them off, and none of a model's weights
registering.py   forward hooks that come off with a block
fingerprints.py  what the results of a resumable run depend on
claims.py        which thread and task may run a model that is being steered
unembedding.py   the tokens whose logits a direction raises
"""
