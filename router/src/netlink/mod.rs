//! Links, addresses, routes, rules, sysctls and nf_tables.
