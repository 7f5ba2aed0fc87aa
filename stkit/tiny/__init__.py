"""How the models that ship are made: walks, lessons on them, stages of training, and what they score."""
