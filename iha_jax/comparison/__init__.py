"""Many runs, one table: arms, their results, statistics over seeds, and the picture."""
