"""The small Stable Diffusion that ships, a subject to teach it, and `lorakern demo`."""
