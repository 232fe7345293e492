"""`rgexport serve`: artifacts behind OpenAI's HTTP interface."""
