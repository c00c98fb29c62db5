"""Files that are written in full or not at all, long work in resumable shards, locks, and the network.

atomic.py      files and folders that are written in full or not at all
files.py       files of tensors with a header and a hash
json_files.py  JSON, read without trust
json_values.py  frozen dataclasses from plain JSON
lines.py       files of lines, plain or compressed
targets.py     where a file or folder may be written
locks.py       one writer at a time
shards.py      long work in pieces, from which a killed run goes on
plans.py       whether a run that goes on is the same run
ranks.py       which of several processes this one is
plugins.py     what other packages add to the tables, and how rows are added and their functions imported
version.py     the installed version of fgsteer
network.py     whether the Hugging Face hub can be reached
"""
