"""Language models that read very long contexts: their data, training, evaluation and generation."""
