"""Reading the features of an SAE: density, examples, search, descriptions, output scores and cards."""
