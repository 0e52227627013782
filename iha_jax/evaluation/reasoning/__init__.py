"""GSM8K, MATH-500, MBPP and HumanEval: published prompts, answers taken from texts, and scores."""
