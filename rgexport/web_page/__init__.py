"""The static site of `rgexport web`. The sources of its page are in `page/` of the repository."""
