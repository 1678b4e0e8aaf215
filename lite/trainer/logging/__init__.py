"""`self.log`: what is kept of a logged value, what an epoch makes of it, and who follows it."""
