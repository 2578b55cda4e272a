use super::*;
use crate::tailnet::derp::frames::tests::sent;

/// A relay, as far as these tests need one.
struct Relay {
    secret: NodeSecret,
    client: NodePublic,
}

impl Relay {
    fn new(client: &NodeSecret) -> Self {
        Self {
            secret: NodeSecret::generate().unwrap(),
            client: client.public(),
        }
    }

    fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        [&[kind], &length[..], body].concat()
    }

    fn greeting(&self) -> Vec<u8> {
        let body = ["DERP🔑".as_bytes(), self.secret.public().as_bytes()].concat();
        Self::frame(1, &body)
    }

    fn boxed(&self) -> SalsaBox {
        let secret = SecretKey::from_bytes(*self.secret.expose());
        SalsaBox::new(&PublicKey::from_bytes(*self.client.as_bytes()), &secret)
    }

    fn info(&self, text: &str) -> Vec<u8> {
        let sealed = self.boxed().encrypt((&[9; NONCE]).into(), text.as_bytes());
        Self::frame(3, &[&[9; NONCE][..], &sealed.unwrap()].concat())
    }

    /// What the client says of itself.
    fn read(&self, bytes: &[u8]) -> (serde_json::Value, Vec<u8>) {
        assert_eq!(bytes[0], 2);
        let length = u32::from_be_bytes(bytes[1..5].try_into().unwrap()) as usize;
        let (body, rest) = bytes[5..].split_at(length);
        assert_eq!(body[..32], *self.client.as_bytes());
        let nonce: [u8; NONCE] = body[32..56].try_into().unwrap();
        let clear = self.boxed().decrypt((&nonce).into(), &body[56..]).unwrap();
        (serde_json::from_slice(&clear).unwrap(), rest.to_vec())
    }
}

struct Bed {
    session: Session,
    relay: Relay,
    queue: Queue,
    now: Instant,
}

impl Bed {
    /// A session before anything was said.
    fn new(home: bool) -> Self {
        let node = NodeSecret::generate().unwrap();
        let now = Instant::now();
        Self {
            relay: Relay::new(&node),
            session: Session::new(node, None, home, [3; NONCE], now).unwrap(),
            queue: Queue::default(),
            now,
        }
    }

    /// A session that is let in, with what the relay says of itself.
    fn welcome(info: &str) -> Self {
        let mut bed = Self::new(false);
        bed.hear(&bed.relay.greeting()).unwrap();
        bed.hear(&bed.relay.info(info)).unwrap();
        assert_eq!(bed.session.poll_said(), Some(Said::Welcome));
        bed
    }

    fn hear(&mut self, bytes: &[u8]) -> Result<(), SessionError> {
        let mut buffer = BytesMut::from(bytes);
        self.session.handle_input(&mut buffer, self.now)
    }

    fn say(&mut self) -> BytesMut {
        let mut out = BytesMut::new();
        self.session.transmit(&mut self.queue, &mut out, self.now);
        out
    }

    /// Lets time go by until something is said, or the connection is over.
    fn wait(&mut self) -> Result<Vec<u8>, SessionError> {
        loop {
            self.now = self.session.poll_timeout();
            self.session.handle_timeout(self.now)?;
            let said = self.say();
            if !said.is_empty() {
                return Ok(said.to_vec());
            }
        }
    }

    /// Answers the ping that is the last thing said.
    fn answer(&mut self, said: &[u8]) {
        let (_, ping) = said.split_last_chunk::<8>().unwrap();
        assert!(said.ends_with(&Relay::frame(0x12, ping)));
        self.hear(&Relay::frame(0x13, ping)).unwrap();
    }
}

const PEER: NodePublic = NodePublic::from_bytes([7; 32]);

#[test]
fn the_node_is_let_in() {
    let mut bed = Bed::new(true);
    assert!(bed.say().is_empty(), "the relay speaks first");
    assert!(
        bed.queue
            .push(PEER, Bytes::from_static(b"early"), 5, bed.now)
    );
    bed.hear(&bed.relay.greeting()).unwrap();
    let said = bed.say();
    let (info, rest) = bed.relay.read(&said);
    assert_eq!(
        info,
        serde_json::json!({ "version": 2, "CanAckPings": true })
    );
    assert_eq!(rest, Relay::frame(7, &[1]), "home, and no packet yet");
    bed.hear(&bed.relay.info(r#"{"version":2,"new":[]}"#))
        .unwrap();
    assert_eq!(bed.session.poll_said(), Some(Said::Welcome));
    let mut said = bed.say();
    let ping = said.split_to(13);
    assert_eq!(sent(&mut said), [(PEER, Bytes::from_static(b"early"))]);
    bed.now += Duration::from_millis(30);
    bed.answer(&ping);
    let latency = Some(Said::Latency(Duration::from_millis(30)));
    assert_eq!(bed.session.poll_said(), latency);
    bed.session.set_home(false);
    bed.session.set_home(false);
    assert_eq!(bed.say(), Relay::frame(7, &[0])[..]);
}

#[test]
fn a_fast_start_needs_no_greeting_and_minds_none() {
    let mut bed = Bed::new(false);
    let (node, server) = (bed.session.node.clone(), bed.relay.secret.public());
    bed.session = Session::new(node.clone(), Some(server), false, [4; NONCE], bed.now).unwrap();
    let said = bed.say();
    assert!(bed.relay.read(&said).1.is_empty());
    bed.hear(&bed.relay.greeting()).unwrap();
    assert!(bed.say().is_empty(), "once is enough");
    bed.hear(&bed.relay.info("{}")).unwrap();
    assert_eq!(bed.session.poll_said(), Some(Said::Welcome));

    let other = Relay::new(&node).greeting();
    assert_eq!(bed.hear(&other), Err(SessionError::WrongKey));
}

#[test]
fn what_is_no_relay_is_told() {
    for (bytes, error) in [
        (Relay::frame(1, b"DERP"), FrameError::Greeting.into()),
        (Relay::frame(6, b""), FrameError::Greeting.into()),
        (
            b"HTTP/1.1 400".to_vec(),
            FrameError::TooLong(0x5454_502f).into(),
        ),
    ] {
        assert_eq!(Bed::new(false).hear(&bytes), Err(error));
    }
    let mut bed = Bed::new(false);
    bed.hear(&bed.relay.greeting()).unwrap();
    let impostor = Relay::new(&bed.session.node).info("{}");
    assert_eq!(bed.hear(&impostor), Err(SessionError::WrongKey));
    for (info, error) in [
        (bed.relay.info("7"), SessionError::Info),
        (Relay::frame(3, &[0; 23]), SessionError::Info),
        (Relay::frame(3, &[0; 24]), SessionError::WrongKey),
    ] {
        assert_eq!(bed.hear(&info), Err(error));
    }
    let (mut bed, start) = (Bed::new(false), Instant::now());
    assert_eq!(bed.wait(), Err(SessionError::NotLetIn));
    assert!(bed.now - start <= HELLO + Duration::from_secs(1));
}

#[test]
fn what_the_relay_says() {
    let mut bed = Bed::welcome("{}");
    bed.say();
    let packet = [&[7; 32], &b"packet"[..]].concat();
    let mut stream = Relay::frame(5, &packet);
    stream.extend(Relay::frame(0x33, b"news"));
    stream.extend(Relay::frame(8, &[&[7; 32][..], &[1]].concat()));
    stream.extend(Relay::frame(0x14, b"duplicate client"));
    stream.extend(Relay::frame(0x14, b""));
    stream.extend(Relay::frame(0x15, &[0, 0, 1, 0, 0xff, 0xff, 0xff, 0xff]));
    stream.extend(Relay::frame(0x12, b"question"));
    bed.hear(&stream).unwrap();
    let said: Vec<Said> = std::iter::from_fn(|| bed.session.poll_said()).collect();
    let expected = [
        Said::Packet(PEER, Bytes::from_static(b"packet")),
        Said::Gone(PEER, GoneReason::NotHere),
        Said::Health("duplicate client".to_owned()),
        Said::Health(String::new()),
        Said::Restarting {
            reconnect_in: Duration::from_millis(256),
            try_for: MOST_WAIT,
        },
    ];
    assert_eq!(said, expected);
    assert_eq!(bed.say(), Relay::frame(0x13, b"question")[..]);
    // A flood of questions does not fill the memory.
    for _ in 0..10_000 {
        bed.hear(&Relay::frame(0x12, b"question")).unwrap();
    }
    assert!(bed.say().len() <= MOST_CONTROL + 13);
}

#[test]
fn silence_is_asked_about_and_then_believed() {
    let mut bed = Bed::welcome("{}");
    let ping = bed.say().to_vec();
    bed.answer(&ping);
    let heard = bed.now;
    let ping = bed.wait().unwrap();
    assert_eq!(bed.now - heard, QUIET);
    bed.answer(&ping);
    let heard = bed.now;
    bed.wait().unwrap();
    assert_eq!(bed.wait(), Err(SessionError::Silent(QUIET + PATIENCE)));
    assert_eq!(bed.now - heard, QUIET + PATIENCE);
}

#[test]
fn a_relay_that_does_not_answer_what_is_sent_is_found_sooner() {
    let mut bed = Bed::welcome("{}");
    let ping = bed.say().to_vec();
    bed.answer(&ping);
    bed.now += Duration::from_secs(1);
    assert!(
        bed.queue
            .push(PEER, Bytes::from_static(b"packet"), 6, bed.now)
    );
    assert_eq!(sent(&mut bed.say()).len(), 1);
    let sent = bed.now;
    bed.wait().unwrap();
    assert_eq!(bed.now - sent, QUIET_AFTER_SENDING);
    bed.wait().unwrap_err();
    assert_eq!(bed.now - sent, QUIET_AFTER_SENDING + PATIENCE);
}

#[test]
fn any_frame_is_a_sign_of_life() {
    let mut bed = Bed::welcome("{}");
    let ping = bed.say().to_vec();
    bed.answer(&ping);
    for _ in 0..3 {
        bed.wait().unwrap();
        bed.now += PATIENCE / 2;
        bed.hear(&Relay::frame(6, b"")).unwrap();
    }
    bed.session.check(bed.now);
    let asked = bed.now;
    bed.say();
    bed.wait().unwrap_err();
    assert_eq!(bed.now - asked, LITTLE_PATIENCE);
}

#[test]
fn a_relay_that_knows_no_pings_has_its_two_minutes() {
    let mut bed = Bed::welcome("{}");
    let heard = bed.now;
    bed.say();
    assert_eq!(bed.wait(), Err(SessionError::Silent(SILENCE)));
    assert_eq!(bed.now - heard, SILENCE);
}

#[test]
fn the_relays_limit_is_kept_to() {
    let info = r#"{"TokenBucketBytesPerSecond":100000,"TokenBucketBytesBurst":5000}"#;
    let mut bed = Bed::welcome(info);
    let ping = bed.say().to_vec();
    bed.answer(&ping);
    let (start, mut bytes) = (bed.now, 0);
    while bed.now < start + Duration::from_secs(3) {
        let batch = Bytes::from(vec![0; 20 * 1400]);
        assert!(bed.queue.push(PEER, batch, 1400, bed.now));
        loop {
            let mut said = bed.say();
            let datagrams = sent(&mut said);
            if datagrams.is_empty() {
                break;
            }
            bytes += datagrams.len() * (1400 + OVERHEAD);
        }
        // It wakes when there is room again, and not without end.
        let next = bed.session.poll_timeout();
        assert!(next > bed.now && next < bed.now + Duration::from_millis(20));
        bed.now = next;
        bed.session.handle_timeout(bed.now).unwrap();
    }
    assert!((295_000..=306_500).contains(&bytes), "{bytes}");
}
