"""How rows become a loss: packing attention, the loss over trained positions, and what makes both fast."""
