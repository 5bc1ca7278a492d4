"""The row ops: their contract, and what runs them."""
