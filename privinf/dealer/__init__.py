"""The dealer: hands out correlations, and sees neither."""
