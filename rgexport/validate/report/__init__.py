"""The outcome for people and programs: text, one HTML page, JSON and its schema."""
