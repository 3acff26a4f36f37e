"""Weights of other people's models: read from Hugging Face and llama.cpp files, written for Hugging Face."""
