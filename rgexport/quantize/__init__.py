"""How weights are stored: schemes, plans and the algorithms that fill them."""
