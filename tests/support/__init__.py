"""What the tests share: ranks, layouts, models, cases, the witness of the wire, the float64 reference."""
