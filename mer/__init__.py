"""Run Mixture-of-Experts language models that are larger than memory."""
