"""SEP: a witness tells whether a probe was followed, in the data or in the instruction."""
