"""From files of text and dialogs to batches of token ids."""
