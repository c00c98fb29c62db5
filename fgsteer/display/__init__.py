"""How results show themselves to a person: tables in notebooks and terminals, and progress bars."""
