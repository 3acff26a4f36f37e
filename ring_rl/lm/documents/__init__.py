"""Text and codes of other kinds as documents, and packed rows of them."""
