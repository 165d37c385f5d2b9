"""Does a model process an instruction in its data, execute it, or pass over it?"""
