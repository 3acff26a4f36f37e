"""Questions about long texts: their exact wording, their answers, and what an answer is worth."""
