"""The mathematics of diffusion without a network: schedules, step coefficients and the variational bound."""
