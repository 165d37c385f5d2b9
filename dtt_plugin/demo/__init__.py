"""What a newcomer sees first: the whole job on a small real model."""
