"""vnetdp.testing: tools for the tests of a device, a driver or a back end. `explore` is a package of its own."""
