"""The check of a composed config: every key exists, and every value is of its kind."""
