"""What is made of a batch before a loss: masks, spans, supports, teachers."""
