"""What the formats' engines may differ by."""
