"""The figure of accuracy against context length as one plan: cells to train and to ask, and what is made of them."""
