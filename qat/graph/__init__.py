"""From a module to integers: trace, measure, plan, insert, convert."""
