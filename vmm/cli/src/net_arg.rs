//! `--net`: the network card's tap, and what is known of it.

use std::str::FromStr;

use ftvmm_devices::MTU_MIN;

/// `tap=NAME[,mac=M][,mtu=N][,uplink=NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetArg {
    /// The tap's name.
    pub tap: String,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The MTU the tap must have.
    pub mtu: Option<u16>,
    /// The interface that leads to the clients, behind the tap's bridge.
    pub uplink: Option<String>,
}

/// Locally administered; the same on both hosts, as it must be.
const DEFAULT_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x46, 0x54, 0x01];

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut tap, mut mac, mut mtu, mut uplink) = (None, DEFAULT_MAC, None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("tap", name)) => tap = Some(name.to_owned()),
                Some(("mac", address)) => mac = parse_mac(address)?,
                Some(("mtu", bytes)) => mtu = Some(parse_mtu(bytes)?),
                Some(("uplink", name)) => uplink = Some(name.to_owned()),
                _ => {
                    return Err(format!(
                        "'{part}' is not tap=NAME, mac=aa:bb:cc:dd:ee:ff, mtu=BYTES or uplink=NAME"
                    ));
                }
            }
        }
        Ok(Self { tap: tap.ok_or("tap=NAME is missing")?, mac, mtu, uplink })
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|b| u8::from_str_radix(b, 16).ok().filter(|_| b.len() == 2)).collect();
    let mac: [u8; 6] = bytes
        .and_then(|b| b.try_into().ok())
        .ok_or_else(|| format!("'{text}' is no MAC address like 52:54:00:46:54:01"))?;
    if mac[0] & 1 != 0 {
        return Err(format!("'{text}' is a multicast address; the first byte must be even"));
    }
    Ok(mac)
}

fn parse_mtu(text: &str) -> Result<u16, String> {
    let mtu = text.parse().ok().filter(|mtu| *mtu >= MTU_MIN);
    mtu.ok_or_else(|| format!("'{text}' is no MTU: {MTU_MIN} to {} bytes", u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn net_takes_a_tap_and_a_mac() {
        let net: NetArg = "tap=ftvm0,mac=02:00:00:00:00:09".parse().unwrap();
        let wanted =
            NetArg { tap: "ftvm0".into(), mac: [2, 0, 0, 0, 0, 9], mtu: None, uplink: None };
        assert_eq!(net, wanted);
        let net: NetArg = "uplink=eth0,tap=t,mtu=9000".parse().unwrap();
        assert_eq!((net.uplink.as_deref(), net.mtu), (Some("eth0"), Some(9000)));
        assert_eq!("tap=t".parse::<NetArg>().unwrap().mac, DEFAULT_MAC);
    }

    #[test]
    fn bad_values_say_what_would_be_right() {
        for (text, wanted) in [
            ("mac=02:00:00:00:00:09", "tap=NAME is missing"),
            ("tap=a,mac=1:2:3", "52:54:00:46:54:01"),
            ("tap=a,mac=03:00:00:00:00:09", "must be even"),
            ("eth0", "not tap=NAME"),
            ("tap=a,mtu=67", "68 to 65535"),
            ("tap=a,mtu=65536", "68 to 65535"),
        ] {
            let error = text.parse::<NetArg>().unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }
}
