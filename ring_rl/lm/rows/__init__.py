"""Rows that a language model is trained on, made by index: records with questions, packed documents, mixtures."""
