"""The chat page of `rgexport web`: a static site. Its sources are in `page/` of the repository."""
