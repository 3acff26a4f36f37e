"""What a language model finds in its context, measured: suites of tasks, scores with intervals, pictures."""
