"""The Hub: the model card, what of a result goes there, and how."""
