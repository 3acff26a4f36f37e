"""A whole comparison as one plan: data, cells to train and evaluate, and the tables that come of them."""
