"""The paper's mathematics without a network: schedules, step coefficients, the variational bound."""
