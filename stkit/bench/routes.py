"""Routes as sequences of steps."""

LANDMARKS = ("brick", "wood", "marble", "metal", "computer", "fire", "ash", "skin", "torch", "column", "tree", "barrel")
ACTIONS = ("look up", "look down", "step back", "pause", "pick up", "open a door")
