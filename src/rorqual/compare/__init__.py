"""The proof: how much less one way of training needs than another, measured on this machine."""
