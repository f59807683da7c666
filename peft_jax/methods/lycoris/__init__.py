"""LoHa and LoKr, of the LyCORIS library."""
