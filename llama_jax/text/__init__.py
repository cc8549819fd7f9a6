"""Tokenizers and prompt formats: text to token ids and back."""
