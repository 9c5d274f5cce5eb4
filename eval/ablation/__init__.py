"""What happens to the losses when the routing or an expert is changed."""
