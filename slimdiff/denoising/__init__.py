"""Real denoising trajectories, and watching modules while they run."""
