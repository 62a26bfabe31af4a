"""``moepack serve``: transformers' OpenAI-compatible handlers over one loaded pack."""
