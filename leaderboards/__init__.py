"""A leaderboard is a folder: its frozen protocol and its entries; here too is the builder of tables and pictures."""
