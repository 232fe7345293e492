"""Files on a disk: written whole or not at all, hashed, and looked at before they are opened."""
