"""The benchmark: what is generated under which condition, scored, recorded, and reported."""
