"""Text to token ids and back: bytes, words, Hugging Face, SentencePiece, and what a GGUF file holds."""
