"""How good a model is: loss on rows, and scores of what it writes."""
