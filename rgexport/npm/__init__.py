"""The npm package `rgexport-web`: artifacts in transformers.js."""
