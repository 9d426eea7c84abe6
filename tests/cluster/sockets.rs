//! The connections of the product's pods, as the kernel shows them while a test goes on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{read_dir, read_link, read_to_string},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// How often sockets are looked at; a closed connection of TCP is seen for a minute.
const INTERVAL: Duration = Duration::from_millis(50);
/// Names of the programs, as far as the kernel keeps them.
const PROGRAMS: [&str; 2] = ["finetune", "finetune-traine"];
/// The addresses of Services: what a connection to one was translated to, conntrack tells.
const SERVICES: &str = "10.96.";
/// Where our programs listen: of one that just ended, connections are seen but no more the listener.
const SERVED: [u16; 3] = [8080, 9464, 29500];
/// The state of a socket that listens.
const LISTENS: &str = "0A";

/// A connection, or a question, after the translation of a Service's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    pub protocol: &'static str,
    pub from: IpAddr,
    pub to: IpAddr,
    pub port: u16,
}

/// Looks until it is told to stop.
pub struct Watcher {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<BTreeSet<Flow>>,
}

impl Watcher {
    pub fn start() -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let look = move || {
            let mut seen = BTreeSet::new();
            while !over.load(Ordering::Relaxed) {
                look_at_sockets(&mut seen);
                look_at_translations(&mut seen);
                std::thread::sleep(INTERVAL);
            }
            seen
        };
        Self { is_over, thread: std::thread::spawn(look) }
    }

    pub fn stop(self) -> BTreeSet<Flow> {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Reads the sockets of every network that a pod of ours has.
fn look_at_sockets(seen: &mut BTreeSet<Flow>) {
    let own = read_link("/proc/self/ns/net").ok();
    let mut networks = BTreeMap::new();
    for entry in read_dir("/proc").into_iter().flatten().filter_map(Result::ok) {
        let path = entry.path();
        let name = read_to_string(path.join("comm")).unwrap_or_default();
        if PROGRAMS.contains(&name.trim()) {
            // It may have ended meanwhile.
            let network =
                read_link(path.join("ns/net")).ok().filter(|network| Some(network) != own.as_ref());
            networks.extend(network.map(|network| (network, path)));
        }
    }
    for path in networks.values() {
        let mut tcp = sockets(&path.join("net/tcp"));
        tcp.extend(sockets(&path.join("net/tcp6")));
        let listening: BTreeSet<u16> =
            tcp.iter().filter(|socket| socket.listens).map(|socket| socket.local.1).collect();
        for Socket { local, remote, listens } in tcp {
            let is_inner = local.0.is_loopback() || remote.0.is_unspecified();
            if listens || is_inner || remote.0.to_string().starts_with(SERVICES) {
                continue;
            }
            let (from, to, port) = if listening.contains(&local.1) || SERVED.contains(&local.1) {
                (remote.0, local.0, local.1)
            } else {
                (local.0, remote.0, remote.1)
            };
            seen.insert(Flow { protocol: "TCP", from, to, port });
        }
    }
}

struct Socket {
    local: (IpAddr, u16),
    remote: (IpAddr, u16),
    listens: bool,
}

/// Reads `  0: 0100007F:1F90 00000000:0000 0A …`, the words after a heading.
fn sockets(file: &Path) -> Vec<Socket> {
    let text = read_to_string(file).unwrap_or_default();
    text.lines().skip(1).filter_map(socket).collect()
}

fn socket(line: &str) -> Option<Socket> {
    let mut words = line.split_whitespace().skip(1);
    let (local, remote) = (end(words.next()?)?, end(words.next()?)?);
    Some(Socket { local, remote, listens: words.next()? == LISTENS })
}

/// Addresses are words of 32 bits in the machine's order.
fn end(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok();
    let address = if address.len() == 8 {
        IpAddr::V4(Ipv4Addr::from(word(0)?.to_le_bytes()))
    } else {
        let words = [word(0)?, word(8)?, word(16)?, word(24)?].map(u32::to_le_bytes);
        let bytes: [u8; 16] = words.concat().try_into().ok()?;
        IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
    };
    Some((address, u16::from_str_radix(port, 16).ok()?))
}

/// Reads what was routed through the node: there and back, with a Service's address translated.
fn look_at_translations(seen: &mut BTreeSet<Flow>) {
    let text = read_to_string("/proc/net/nf_conntrack").unwrap_or_default();
    seen.extend(text.lines().filter_map(translation));
}

/// Reads `ipv4 2 udp 17 29 src=A dst=S sport=N dport=53 [UNREPLIED] src=B dst=A sport=5353 …`: the
/// first source asked, the second answered.
fn translation(line: &str) -> Option<Flow> {
    let protocol = match line.split_whitespace().nth(2)? {
        "tcp" => "TCP",
        "udp" => "UDP",
        _ => return None,
    };
    let values = |key: &'static str| {
        line.split_whitespace().filter_map(move |word| word.strip_prefix(key)?.strip_prefix('='))
    };
    let from = values("src").next()?.parse().ok()?;
    let to = values("src").nth(1)?.parse().ok()?;
    Some(Flow { protocol, from, to, port: values("sport").nth(1)?.parse().ok()? })
}

#[test]
fn the_kernels_lines_are_read() {
    let socket = socket("   1: 0F00580A:8A3C 0100580A:208D 01 00000000:00000000 00:0 0 0").unwrap();
    assert_eq!(socket.local, (Ipv4Addr::new(10, 88, 0, 15).into(), 35388));
    assert_eq!(socket.remote, (Ipv4Addr::new(10, 88, 0, 1).into(), 8333));
    assert!(!socket.listens);
    let mapped = end("0000000000000000FFFF00000F00580A:1F90").unwrap();
    assert_eq!(mapped, (Ipv4Addr::new(10, 88, 0, 15).into(), 8080));
    let line = "ipv4     2 udp      17 29 src=10.88.0.15 dst=10.96.0.10 sport=5000 dport=53 src=10.88.0.1 dst=10.88.0.15 sport=5353 dport=5000 mark=0 use=2";
    let flow = translation(line).unwrap();
    assert_eq!((flow.protocol, flow.port), ("UDP", 5353));
    assert_eq!(flow.from, IpAddr::V4(Ipv4Addr::new(10, 88, 0, 15)));
    assert_eq!(flow.to, IpAddr::V4(Ipv4Addr::new(10, 88, 0, 1)));
}
